-- Users: each row is its user's snapshot at `version`. The history is in `events`; rebuilding a user from there gives his row. Every
-- rule that the database can hold is here, so that no defect of the service gets past it.
CREATE TABLE users (
    user_id uuid PRIMARY KEY,
    -- How many events the user has had.
    version bigint NOT NULL CHECK (version > 0),
    -- As the user writes it, but for the domain, which is in lower case.
    email text COLLATE "C" NOT NULL
        CONSTRAINT users_email_shape CHECK (length(email) BETWEEN 3 AND 254 AND email ~ '^[^[:space:][:cntrl:]]+@[^@A-Z[:space:][:cntrl:]]+$'),
    first_name text NOT NULL,
    last_name text NOT NULL,
    created_at timestamptz NOT NULL,
    -- When the last event happened.
    updated_at timestamptz NOT NULL CHECK (updated_at >= created_at),

    CONSTRAINT users_first_name CHECK (length(first_name) BETWEEN 1 AND 100 AND btrim(first_name) <> '' AND first_name !~ '[[:cntrl:]]'),
    CONSTRAINT users_last_name CHECK (length(last_name) BETWEEN 1 AND 100 AND btrim(last_name) <> '' AND last_name !~ '[[:cntrl:]]')
)
-- Rows change now and then: leave room for updates in place, of all but the address.
WITH (fillfactor = 80);

-- One user per address, whatever the case, in every script: by Unicode's rules and not those of the database's locale.
CREATE UNIQUE INDEX users_email ON users (lower(email COLLATE "und-x-icu"));

-- Versions only rise, and users are for ever.
CREATE FUNCTION users_refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP <> 'UPDATE' THEN
        RAISE EXCEPTION 'users are for ever: % refused', TG_OP USING ERRCODE = 'restrict_violation';
    END IF;
    IF (NEW.user_id, NEW.created_at) IS DISTINCT FROM (OLD.user_id, OLD.created_at)
       OR NEW.version <= OLD.version
       OR NEW.updated_at < OLD.updated_at
    THEN
        RAISE EXCEPTION 'user %: this change is refused', OLD.user_id USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NEW;
END
$$;

CREATE TRIGGER users_guard BEFORE UPDATE ON users
    FOR EACH ROW EXECUTE FUNCTION users_refuse_change();
CREATE TRIGGER users_for_ever BEFORE DELETE OR TRUNCATE ON users
    FOR EACH STATEMENT EXECUTE FUNCTION users_refuse_change();
