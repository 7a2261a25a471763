"""The fastest of the lossless forms of a model: a cost model of the runtime's kernels, and timing of whole models."""
