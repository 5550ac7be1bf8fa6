"""What an evaluation found, as tables, figures, a page to read, and files for programs."""
