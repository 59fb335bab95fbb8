-- What there is of each product, and what is held for each order. Every rule that the database can hold is here, so that no defect of
-- the service gets past it.

-- Whether these are the lines of an order: [{"product_id": uuid, "quantity": 1..10000}, …], 1 to 100 of distinct products.
CREATE FUNCTION are_lines(lines jsonb) RETURNS boolean LANGUAGE sql IMMUTABLE STRICT AS $$
    SELECT CASE WHEN jsonb_typeof(lines) = 'array' THEN
        jsonb_array_length(lines) BETWEEN 1 AND 100
        AND NOT jsonb_path_exists(lines, '$[*] ? (!exists(@.product_id) || !exists(@.quantity))')
        AND NOT jsonb_path_exists(lines, '$[*] ? (@.quantity.type() != "number" || @.quantity < 1 || @.quantity > 10000)')
        AND jsonb_array_length(lines) = (SELECT count(DISTINCT line ->> 'product_id') FROM jsonb_array_elements(lines) line)
    ELSE false END
$$;

-- Stock: each row is its product's snapshot at `version`; the history is in `events`. Rows are locked in the order of their ids.
CREATE TABLE stock (
    product_id uuid PRIMARY KEY,
    -- How many events the stock has had.
    version bigint NOT NULL CHECK (version > 0),
    -- Pieces that can be ordered, that are held for orders, and that belong to orders which are confirmed.
    available bigint NOT NULL CHECK (available >= 0),
    reserved bigint NOT NULL CHECK (reserved >= 0),
    sold bigint NOT NULL CHECK (sold >= 0),
    -- When the last event happened.
    updated_at timestamptz NOT NULL
)
-- No index has a column that changes: leave room for updates in place.
WITH (fillfactor = 70);

-- What was decided about the stock of each order: a row is its reservation's snapshot at `version`.
CREATE TABLE reservations (
    order_id uuid PRIMARY KEY,
    -- How many events the reservation has had.
    version bigint NOT NULL,
    status text COLLATE "C" NOT NULL,
    lines jsonb NOT NULL CHECK (are_lines(lines)),
    -- [{"product_id": uuid, "wanted": 1..10000, "available": less than that}, …]: why it was rejected.
    shortages jsonb,
    -- When it was reserved or rejected.
    decided_at timestamptz NOT NULL,
    committed_at timestamptz CHECK (committed_at >= decided_at),
    released_at timestamptz CHECK (released_at >= decided_at AND released_at >= committed_at),

    CONSTRAINT reservations_shortages CHECK (
        CASE WHEN shortages IS NULL THEN status <> 'rejected'
             WHEN jsonb_typeof(shortages) <> 'array' THEN false
             ELSE status = 'rejected' AND jsonb_array_length(shortages) BETWEEN 1 AND jsonb_array_length(lines)
                AND NOT jsonb_path_exists(shortages, '$[*] ? (!(@.available >= 0 && @.available < @.wanted))')
        END
    ),
    -- The status says what has happened and what has not, and the version counts it.
    CONSTRAINT reservations_status CHECK (
        CASE status
            WHEN 'reserved' THEN version = 1 AND num_nonnulls(committed_at, released_at) = 0
            WHEN 'rejected' THEN version = 1 AND num_nonnulls(committed_at, released_at) = 0
            WHEN 'committed' THEN version = 2 AND committed_at IS NOT NULL AND released_at IS NULL
            WHEN 'released' THEN version = 2 + num_nonnulls(committed_at) AND released_at IS NOT NULL
            ELSE false
        END
    )
)
WITH (fillfactor = 80);

CREATE FUNCTION inventory_refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% is for ever: % refused', TG_TABLE_NAME, TG_OP USING ERRCODE = 'restrict_violation';
END
$$;

-- Orders move pieces and make none: whatever changes what is reserved or sold keeps the sum.
CREATE FUNCTION stock_guard_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.product_id <> OLD.product_id OR NEW.version <> OLD.version + 1 OR NEW.updated_at < OLD.updated_at
       OR ((NEW.reserved, NEW.sold) <> (OLD.reserved, OLD.sold)
           AND NEW.available + NEW.reserved + NEW.sold <> OLD.available + OLD.reserved + OLD.sold)
    THEN
        RAISE EXCEPTION 'stock of %: this change is refused', OLD.product_id USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NEW;
END
$$;

-- Nobody has ordered what is not known yet.
CREATE FUNCTION stock_guard_insert() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF (NEW.version, NEW.reserved, NEW.sold) <> (1, 0, 0) THEN
        RAISE EXCEPTION 'stock of %: this beginning is refused', NEW.product_id USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NEW;
END
$$;

-- A reservation only goes forward, and what has happened stays as it was.
CREATE FUNCTION reservations_guard_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF (NEW.order_id, NEW.lines, NEW.shortages, NEW.decided_at)
        IS DISTINCT FROM
       (OLD.order_id, OLD.lines, OLD.shortages, OLD.decided_at)
       OR (OLD.committed_at IS NOT NULL AND NEW.committed_at IS DISTINCT FROM OLD.committed_at)
       OR NEW.version <= OLD.version
       OR OLD.status IN ('rejected', 'released')
       OR (OLD.status = 'committed' AND NEW.status <> 'released')
    THEN
        RAISE EXCEPTION 'reservation of order %: this change is refused', OLD.order_id
            USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NEW;
END
$$;

CREATE TRIGGER stock_guard BEFORE UPDATE ON stock
    FOR EACH ROW EXECUTE FUNCTION stock_guard_change();
CREATE TRIGGER stock_begins BEFORE INSERT ON stock
    FOR EACH ROW EXECUTE FUNCTION stock_guard_insert();
CREATE TRIGGER stock_for_ever BEFORE DELETE OR TRUNCATE ON stock
    FOR EACH STATEMENT EXECUTE FUNCTION inventory_refuse_change();
CREATE TRIGGER reservations_guard BEFORE UPDATE ON reservations
    FOR EACH ROW EXECUTE FUNCTION reservations_guard_change();
CREATE TRIGGER reservations_for_ever BEFORE DELETE OR TRUNCATE ON reservations
    FOR EACH STATEMENT EXECUTE FUNCTION inventory_refuse_change();
