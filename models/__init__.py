"""The networks, their weights, and how they are trained and measured. Knows nothing of DICOM."""
