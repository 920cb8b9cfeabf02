"""One request's way without a transport: read, classified, parked, answered, settled."""
