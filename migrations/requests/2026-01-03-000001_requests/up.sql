-- Commands that took effect, by the id that their caller chose, with the response that a repeat gets.
CREATE TABLE requests (
    caller text COLLATE "C" NOT NULL CHECK (caller <> '' AND length(caller) <= 200),
    method text COLLATE "C" NOT NULL CHECK (method <> ''),
    request_id uuid NOT NULL,
    -- SHA-256 of the request.
    fingerprint bytea NOT NULL CHECK (length(fingerprint) = 32),
    -- Protobuf. NULL only inside the transaction that does the work.
    response bytea,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (caller, method, request_id)
)
-- Every row is written once more, with its response, in the same page.
WITH (fillfactor = 70);

-- For removing what is older than the time that repeats are promised.
CREATE INDEX requests_created_at ON requests (created_at);
