from sftcli.cli import app

app()
