"""The OpenAI API over HTTP, on one session. app.py has the endpoints, lifecycle.py the command `ringlm serve`."""
