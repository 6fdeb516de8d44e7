"""What any room may use, and what knows nothing of pictures, networks or features."""
