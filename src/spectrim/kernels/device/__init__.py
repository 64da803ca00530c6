"""The Triton forms as torch operators. They import Triton, so they are imported only when one of them runs."""
