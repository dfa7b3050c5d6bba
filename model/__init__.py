"""The DeepSeek-V3 architecture: configuration, checkpoint slices, layers, KV pages, sampling, tokenizer."""
