DROP TABLE reservations, stock;
DROP FUNCTION inventory_refuse_change, stock_guard_change, stock_guard_insert, reservations_guard_change, are_lines;
