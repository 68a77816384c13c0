"""What `watch` is made of: one watcher at a time, checkpoints found and measured, the best kept, the page."""
