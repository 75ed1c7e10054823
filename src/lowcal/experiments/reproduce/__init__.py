"""The paper's tables and figures, trained and shown beside the published figures."""
