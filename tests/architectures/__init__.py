"""Small torch modules, each built like a stage or two of an architecture that people use."""
