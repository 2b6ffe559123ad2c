"""The agent at work: a server for who asks, a desk for who knows. Needs the extra `serve`; nothing else imports it."""
