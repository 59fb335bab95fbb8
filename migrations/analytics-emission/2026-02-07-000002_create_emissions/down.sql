DROP TABLE emission_turn, window_emissions;
