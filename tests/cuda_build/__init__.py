"""The compile gate: CUDA sources are compiled for every architecture, their machine code held to a committed table."""
