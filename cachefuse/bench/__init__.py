"""Speed and storage, measured on the machine at hand."""
