"""A real engine under load for half an hour while everything around it breaks: every answer must stay right."""
