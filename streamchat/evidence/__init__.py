"""What the method costs and gains, in figures: perplexity, speed and memory beside what people would use instead."""
