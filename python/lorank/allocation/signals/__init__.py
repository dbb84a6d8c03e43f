"""The methods of `allocate`: one file each."""
