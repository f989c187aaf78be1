"""The pictures of the page "How normalization works", one in a file; docs/pictures.py draws all."""
