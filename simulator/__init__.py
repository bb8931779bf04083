"""A strict, stateful imitation of Microsoft Graph's mail, to develop and to prove against.

It keeps mailboxes, drafts, upload sessions and limits as Graph does, refuses what Graph refuses, and fails on request
in the ways that Graph fails on its own. It knows nothing of the product: whatever speaks to Graph can speak to it.
"""
