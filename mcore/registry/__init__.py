"""The registry of the store: which exported model is candidate, staging and production, and how it came to that.

<store>/registry/<model>/
    candidate, staging, production    links to a release each, moved in one step
    releases/<id>/                    a model as it is served: links to an artifact's files, README.md, release.json
    history.jsonl                     every move, a line each, oldest first; lines are only ever added
    approvals/<key>.json              who was asked, and what he said

A release never changes. What it links to is an artifact of the store, which the release names with its digest, so the
room of a model is taken once. Light: no torch, no hub's client.
"""
