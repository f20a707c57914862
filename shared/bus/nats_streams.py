"""Makes JetStream streams, and accepts those that are already there."""

from __future__ import annotations

import logging

import nats.js.errors
from nats.js import JetStreamContext, api

from shared.bus.nats_errors import is_settings_conflict, translated

logger = logging.getLogger(__name__)


async def ensure_stream(jetstream: JetStreamContext, config: api.StreamConfig) -> None:
    """Make the stream, or use the one of that name as it is.

    Another process may run with other limits: the first one to come decides, and the others say so
    instead of changing a stream under its users.
    """
    with translated(f"make stream {config.name}"):
        try:
            await jetstream.add_stream(config)
        except nats.js.errors.APIError as error:
            if not is_settings_conflict(error):
                raise
            logger.warning("stream %s exists with other settings; using it as it is", config.name)
