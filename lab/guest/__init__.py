"""What runs inside the lab's guests: `init` and the agent. Nothing of the host imports it."""
