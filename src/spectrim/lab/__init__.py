"""The lab: train small language models on real text and compare optimizer recipes on equal terms.

Everything here needs the extra ``spectrim[lab]``; nothing in the core imports it.
"""
