"""The tables of a run's store, for the collector that writes them and the queries that read them."""

from __future__ import annotations

VERSION = 2

# records: `body` is TEXT, or a BLOB with the JSON of a structured body; `attributes` is JSON without log.record.uid
# and log.iostream, which `source`, `start`, `end` and `stream` hold. resources: the counters save a summary the full
# scan. sources: one for each "writer/file/generation". seen: start, end, start, end, … as native u64, one row for
# each source and batch, `last` being the highest start in it. waiting: lines for the text files that wait until their
# process is placed (routes.py), `otherwise` being the file for those that never are. The index holds the resource
# too, so that a filter by role, rank, actor, node or channel is decided without reading the records that it rejects.
TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE resources (
    id INTEGER PRIMARY KEY, attributes TEXT NOT NULL UNIQUE, service TEXT NOT NULL, role TEXT, rank INTEGER, node TEXT,
    node_id TEXT, channel TEXT NOT NULL, actor_id TEXT, actor_name TEXT, actor_class TEXT, task TEXT, pid INTEGER,
    writer TEXT, records INTEGER NOT NULL DEFAULT 0, errors INTEGER NOT NULL DEFAULT 0, bytes INTEGER NOT NULL DEFAULT 0,
    first_time INTEGER, last_time INTEGER
);
CREATE TABLE scopes (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE sources (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, writer TEXT NOT NULL, file TEXT NOT NULL,
    generation INTEGER NOT NULL, low_water INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE seen (id INTEGER PRIMARY KEY, source INTEGER NOT NULL, last INTEGER NOT NULL, spans BLOB NOT NULL);
CREATE INDEX seen_by_source ON seen (source, last);
CREATE TABLE records (
    id INTEGER PRIMARY KEY, time INTEGER NOT NULL, observed INTEGER NOT NULL, severity INTEGER NOT NULL,
    severity_text TEXT, scope INTEGER NOT NULL, body, stream TEXT, attributes TEXT, event_name TEXT,
    resource INTEGER NOT NULL, source INTEGER, start INTEGER, end INTEGER
);
CREATE INDEX records_by_time ON records (time, resource);
CREATE INDEX records_by_event ON records (event_name) WHERE event_name IS NOT NULL;
CREATE TABLE texts (channel TEXT PRIMARY KEY, path TEXT NOT NULL, length INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE followed (process TEXT PRIMARY KEY, rule TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE waiting (id INTEGER PRIMARY KEY, process TEXT NOT NULL, otherwise TEXT NOT NULL, text BLOB NOT NULL);
CREATE TABLE agents (agent TEXT PRIMARY KEY, heard_unix_nano INTEGER NOT NULL, status TEXT NOT NULL) WITHOUT ROWID;
"""
