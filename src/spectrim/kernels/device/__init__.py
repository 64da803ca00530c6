"""The Triton forms, as operators of torch: imported where one of them is to run, for they import Triton."""
