"""What is kept for a parameter between steps."""
