"""The model over HTTP: an API in OpenAI's form and a web page. Needs fastapi and uvicorn, imported on first use."""
