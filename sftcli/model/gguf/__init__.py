"""GGUF, llama.cpp's one-file format: reading, writing, and how its names and layouts differ from Hugging Face's."""
