"""Root of the repository as a host sees it. Nothing is imported here, so pip, pytest and hosts may import it freely."""
