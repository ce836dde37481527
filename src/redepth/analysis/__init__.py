"""What a recurrent model is made of and what its depth costs."""
