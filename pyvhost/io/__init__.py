"""The parts of pyvhost that do I/O: the data-plane thread, the server, the frontend, mapping and fences."""
