-- What waits by the correlation id of its headers, which often names what people ask about when the key does not. Cut to the length
-- of a UUID, since nothing else is looked for and a longer one might not fit into an index.
CREATE INDEX parked_records_by_correlation ON parked_records (
    consumer, generation,
    left(jsonb_path_query_first(headers, 'strict $[*] ? (@[0] == "correlation-id")[1]', '{}', true) #>> '{}', 36)
) WHERE state = 'parked';
