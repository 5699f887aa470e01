"""What makes the real engines fast and small. Imports torch, so only the engines import it."""
