"""Make trained PyTorch networks small and tough, and run them fast at 2 to 4 bits."""
