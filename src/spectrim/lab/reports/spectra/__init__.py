"""Reports of ``spectrim spectrum``: tables, pictures, the reading in words, and its part of the HTML page."""
