"""From image folders to micro-batches: sources, captions, buckets, epoch plan, dataset."""
