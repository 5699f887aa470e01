"""vidgen: reference image and prompt to edited frame to video, as event-driven GPU services."""

__version__ = "0.1.0"
