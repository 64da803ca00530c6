"""Writes TensorBoard's event files in the calling thread, so that a full disk raises there."""

import os
import socket
import time
from collections.abc import Collection, Mapping
from pathlib import Path

__all__ = ["EventFile"]


class EventFile:
    """Scalars, texts and settings of one process; a process that resumes a run opens another file beside the first."""

    def __init__(self, folder: Path, *, purge_step: int) -> None:
        """Begin a file; TensorBoard ignores entries of earlier files from ``purge_step`` on."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        name = f"events.out.tfevents.{time.time_ns():020d}.{socket.gethostname()}.{os.getpid()}"
        self._folder = folder
        self._file = (folder / name).open("xb")
        self._records = RecordWriter(self._file)
        self._write(Event(wall_time=time.time(), step=purge_step, file_version="brain.Event:2"))
        start = SessionLog(status=SessionLog.START)
        self._write(Event(wall_time=time.time(), step=purge_step, session_log=start))

    def add(self, scalars: Mapping[str, float], step: int) -> None:
        """Write values by tag, all of one step."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._write(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def add_text(self, tag: str, text: str, step: int) -> None:
        """Write a text in Markdown."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.plugins.text.summary_v2 import text_pb

        self._write(Event(wall_time=time.time(), step=step, summary=text_pb(tag, text)))

    def add_hyperparameters(
        self,
        values: Mapping[str, str | float | bool],
        *,
        columns: Mapping[str, type],
        first: Collection[str],
        metrics: Mapping[str, str],
    ) -> None:
        """Write this run's row of TensorBoard's table of hyperparameters.

        Args:
            values: by name.
            columns: of the whole table, the same for every run: str, float or bool by name.
            first: the columns that are shown unless others are asked for.
            metrics: labels, by tag, of the scalars whose last value is in the table.
        """
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2
        from tensorboard.plugins.hparams.summary_v2 import Metric, hparams_pb

        types = {str: api_pb2.DATA_TYPE_STRING, float: api_pb2.DATA_TYPE_FLOAT64, bool: api_pb2.DATA_TYPE_BOOL}
        experiment = api_pb2.Experiment(
            hparam_infos=[
                api_pb2.HParamInfo(name=name, type=types[kind], differs=name in first) for name, kind in columns.items()
            ],
            metric_infos=[Metric(tag, display_name=name).as_proto() for tag, name in metrics.items()],
        )
        about = metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(experiment=experiment))
        table = Summary.Value(tag=metadata.EXPERIMENT_TAG, metadata=about, tensor=metadata.NULL_TENSOR)
        # The folder tells runs of equal values apart.
        row = hparams_pb(dict(values), trial_id="/".join(self._folder.absolute().parts[-3:]))
        for summary in (Summary(value=[table]), row):
            self._write(Event(wall_time=time.time(), summary=summary))

    def flush(self) -> None:
        """Hand everything to the system."""
        self._file.flush()

    def close(self) -> None:
        """Flush and close."""
        self._file.close()

    def _write(self, event: object) -> None:
        self._records.write(event.SerializeToString())  # type: ignore[attr-defined]
