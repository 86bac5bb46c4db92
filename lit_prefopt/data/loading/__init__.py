"""Load batches: workers decode samples, replace broken ones and hand over batches."""
