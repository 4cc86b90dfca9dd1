"""What a segmenter must beat, scored as ours is, and the figure that shows what ours does: accuracy, not speed."""
