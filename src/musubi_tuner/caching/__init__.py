"""Cache files: their format, the jobs that write them, and how training reads them."""
