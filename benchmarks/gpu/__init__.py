"""What a step costs on a GPU: counted without one, measured on one, and the page that shows both."""
