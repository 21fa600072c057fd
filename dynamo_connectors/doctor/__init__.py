"""`dynamo-connectors doctor`: looks at this machine and says what would keep us from working, and what to do."""
