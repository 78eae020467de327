"""What a set of generated images is worth: distances, neighborhoods, the digit judge, result files, pictures."""
