"""Measures the spectra of gradients, updates and weights while a model trains."""

from spectrim.monitor.alarm import Alarm
from spectrim.monitor.monitor import SpectralMonitor
from spectrim.monitor.record import Alert, Record
from spectrim.monitor.sinks import Callback, JsonLines, Sink, TensorBoard, WeightsAndBiases

__all__ = [
    "Alarm",
    "Alert",
    "Callback",
    "JsonLines",
    "Record",
    "Sink",
    "SpectralMonitor",
    "TensorBoard",
    "WeightsAndBiases",
]
