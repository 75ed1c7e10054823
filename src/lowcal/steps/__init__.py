"""The training step, run in several ways: eagerly, with compiled blocks, or as a CUDA graph."""
