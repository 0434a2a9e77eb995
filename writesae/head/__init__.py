"""What one head writes and holds, and the model above it."""
