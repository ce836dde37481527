"""What a recurrent model does inside: recorded, patched and pictured by layer and step."""
