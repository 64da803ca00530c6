"""The HTML page: its frame, its figures in plotly, and its sections for a comparison and for a sweep."""
